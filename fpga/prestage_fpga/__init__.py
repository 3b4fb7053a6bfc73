"""Board builds of Prestage with open tools."""
