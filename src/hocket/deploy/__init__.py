"""A run on machines of different owners: the server's engine, a site's worker, and the links between them."""
