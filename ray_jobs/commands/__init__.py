"""What the subcommands of `cascade` do, where that is more than one call.

`ray_jobs.cli` imports a module when its command is given, so that nobody waits for what another command needs.
"""
