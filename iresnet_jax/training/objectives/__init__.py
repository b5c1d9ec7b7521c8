"""What training minimises, one file each."""
