"""Load generators: they ask a server for work through a TCP port of this host, and write down every
request."""
