"""Where rows meet requests. Below this floor nobody knows a user's frame."""
