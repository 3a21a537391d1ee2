"""The measured tables, one file each: which rows there are, and how one is made."""
