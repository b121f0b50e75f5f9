"""Process 1 of a virtual machine: sets it up, starts the agent, and stands between the agent and the hypervisor."""
