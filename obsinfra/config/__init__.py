"""Every setting, once, and how its value is found: flag > environment > file > default."""
