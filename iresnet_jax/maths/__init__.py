"""The mathematics: functions of arrays and callables."""
