"""Schema migrations, run by alembic in the order of their numbers."""
