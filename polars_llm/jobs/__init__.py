"""The heart: requests in, answers out. What is here must survive a crash at any point."""
