diffuser_loaded = []
adapters = {}
