"""What the engine decides on the host: which sequences run, which KV pages they hold, what the next
batch is. Reads nothing of the device.
"""
