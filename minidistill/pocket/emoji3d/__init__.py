"""The next embedded model: Fluent Emoji 3D, alone and in pairs. When it ships, it replaces the parent folder's."""
