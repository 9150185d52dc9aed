"""The Docker volume plugin: one mount per volume, which outlives the plugin process.

`api` speaks Docker's protocol and knows nothing of volumes; `driver` answers each call from memory; `mounts` starts,
adopts and ends the mount of one volume in a task of its own, with `starts` for how it is begun and `wakeup` for what
ends the task's sleep; `state` keeps the definitions; `inuse` asks the kernel who holds a mount. Nothing of a volume is
lost with this process: definitions are files, mounts are processes.
"""
