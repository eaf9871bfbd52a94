"""What an answer is worth: each metric with its benchmark's own definition."""
