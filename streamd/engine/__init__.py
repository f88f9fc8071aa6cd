"""The engine: Valkey or Redis, where several nodes keep copies of their streams. Imported only if one is configured."""
