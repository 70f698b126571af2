"""Where the system runs: a small cluster on this machine, KubeRay and `ray up` descriptions of real ones."""
