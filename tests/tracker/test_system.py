from detr_exp.tracker.system import system_use


def test_figures_of_the_machine_are_in_range():
    found = system_use()
    assert set(found) == {"system/cpu_percent", "system/ram_gib", "system/process_ram_gib"}
    assert 0 <= found["system/cpu_percent"] <= 100
    assert 0.001 < found["system/process_ram_gib"] < found["system/ram_gib"] < 1e5
