# What each of the tests' programs begins with (tests/src/python.rs): a line for each thing that is as it should be,
# and for each that is not, and a failure at the end where there is one.

import errno, os, sys, time

_wrong = 0

def check(what, found, wanted=True):
    global _wrong
    if found == wanted:
        print('ok', what, flush=True)
    else:
        _wrong += 1
        print(f'WRONG {what}: {shown(found)} and not {shown(wanted)}', flush=True)

def shown(value):
    text = repr(value)
    return text if len(text) < 400 else text[:400] + '…'

def failure(action):
    "The name of the error that this ends with, or what it gives."
    try:
        return action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))

def eventually(what, condition):
    "Looks again and again until it is so, for as long as any one step may take."
    deadline = time.monotonic() + 170
    while not condition():
        if time.monotonic() > deadline:
            return check(what, 'never', 'at last')
        time.sleep(0.02)
    print('ok', what, flush=True)

def forked(count, work):
    "Has `work(number)` done by so many processes at once; whether all of them ended well."
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(number)
                status = 0
            except BaseException as error:
                print(f'process {number}: {error!r}', flush=True)
            finally:
                os._exit(status)
        children.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in children] == [0] * count

def host(what):
    "Asks the test for something that is to be done on the host, and waits until it is."
    print('host:', what, flush=True)
    answer = sys.stdin.readline()
    if answer != 'done\n':
        sys.exit(f'the host answers {answer!r}')

def end():
    print('the end', flush=True)
    sys.exit(1 if _wrong else 0)
