"""Where image data come from: one file for each format, and what all of them have to say in `source`."""
