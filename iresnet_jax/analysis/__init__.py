"""Looking at a trained model: evaluation, figures and the report page."""
