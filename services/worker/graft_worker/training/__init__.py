"""The trainer: one adapter on one device, without network; it speaks only through `graft_worker.protocol`."""
