"""Chats that people see: in the terminal. The parts are conversation, commands, models and screens, in this order."""
