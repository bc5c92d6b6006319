"""What a configuration will do on given devices, before weights are read: sizes, memory, work, compiled programs."""
