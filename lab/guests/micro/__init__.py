"""The microguest: a workload without a kernel."""
