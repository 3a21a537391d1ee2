"""The judges of the exercises, a module a lesson: each compares a function with the kit's own and says what is wrong."""
