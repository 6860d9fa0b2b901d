"""Chats that people see, on a page and in a terminal."""
