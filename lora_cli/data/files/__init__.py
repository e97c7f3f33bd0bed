"""Where rows come from: files of every kind, folders of them, and data sets of the hub."""
