# placeholder: written out with packaging
setup:
	@true
