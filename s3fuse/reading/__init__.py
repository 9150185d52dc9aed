"""The read path: `window` and `siblings` decide what to fetch ahead, `blocks` fetches and keeps, `disk` for longer."""
