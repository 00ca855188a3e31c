"""What a request body says that routing needs, and what a response says of its cost. One file per API."""
