"""One file per framework, which imports that framework only inside its functions, if at all."""
