"""What this machine is: board facts."""
