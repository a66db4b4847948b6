"""What a user sets, read and refused in one place."""
