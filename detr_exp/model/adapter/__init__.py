"""Adapters: few trained parameters beside a network whose own stay as they are."""
