"""Quality and speed in one table: tasks, strategies, models and servers, and what can be told apart."""
