import json, os, stat, subprocess, sys, time

names, small = [], []


def walk():
    names.clear()
    small.clear()
    for top, dirs, files in os.walk("/"):
        dirs[:] = [d for d in dirs if top != "/" or d not in ("proc", "sys", "dev", "run")]
        for name in dirs + files:
            path = os.path.join(top, name)
            st = os.lstat(path)
            names.append(path)
            if stat.S_ISREG(st.st_mode) and st.st_size <= 65536:
                small.append(path)


def read():
    for path in small:
        fd = os.open(path, os.O_RDONLY)
        while os.read(fd, 65536):
            pass
        os.close(fd)


def run():
    for _ in range(200):
        subprocess.run(["/bin/true"], check=True)


def find():
    subprocess.run(["find", "/", "-xdev"], stdout=subprocess.DEVNULL, check=True)


def timed(f):
    """The least of three: what else the machine does only makes it more."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        f()
        took.append(time.perf_counter() - began)
    return min(took)


for _ in range(int(sys.argv[1])):
    walk()
    read()
    find()
took = {"walk": timed(walk), "small": timed(read), "exec": timed(run), "find": timed(find)}
assert len(names) > 50000 and len(small) > 40000
print(json.dumps(took))
