def test_x(trained):
    print(trained.summary)
    print((trained.folder/"metrics.jsonl").read_text())
    import subprocess
    print(subprocess.run(["find", str(trained.folder.parent)],capture_output=True,text=True).stdout)
    assert 0
