"""Files of others, read with care (`untrusted`); files and folders of ours: written so that they
last (`durable`), used by one run at a time (`lock`), and still the same ones (`own_folder`).
"""
