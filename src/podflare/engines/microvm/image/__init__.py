"""What a virtual machine boots: kernel, initramfs and root file system, made from a distribution's packages."""
