"""What a long or a big run needs and no reader of the method: flags, processes, files, intervals, packing."""
