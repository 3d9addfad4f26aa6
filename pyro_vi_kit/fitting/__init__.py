"""From a request to a posterior: which method, where it starts, how long it goes on."""
