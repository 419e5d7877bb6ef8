"""How requests and answers are written, one file an endpoint. Pure: no SDK, no network."""
