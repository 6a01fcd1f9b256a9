"""The user's own guest: what is installed on disk images of theirs."""
