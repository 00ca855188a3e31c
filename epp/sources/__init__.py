"""Where endpoints come from: the command line, a file. Each makes EndpointSpecs; the datastore makes the pool of them."""
