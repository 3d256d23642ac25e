"""Drop-in faces with the published signatures: callers written for ``flash_mla`` keep their calls."""
