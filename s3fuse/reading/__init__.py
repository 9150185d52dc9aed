"""The read path: `window` decides how far ahead, `blocks` fetches and keeps."""
