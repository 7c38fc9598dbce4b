# For folders_window.rs: see there.
set -e
dir=$(mktemp -d /dev/shm/mvm-calls.XXXXXX)
trap 'rm -rf "$dir"' EXIT
mkdir -m 700 "$dir/run" "$dir/state" "$dir/data"
export XDG_RUNTIME_DIR="$dir/run" XDG_STATE_HOME="$dir/state"
cd "$dir/data"
"$mvm" run --name calls --rootfs none -m 256M -v "$dir/data:/data" -- sh -ec '
    cd /data
    wait_for() {
        until read found <"$1" && [ "$found" = "$2" ]; do :; done
    }
    touch up ping
    wait_for ping 0
    mkdir tree
    number=0
    while [ $number -lt 200 ]; do
        number=$((number + 1))
        echo $number >tree/made
        read found <tree/made
        [ $found = $number ]
        mv tree/made tree/file-$number
    done
    touch made
    # Each sees at once what the other does.
    for number in $(seq 1 10); do
        wait_for ping $number
        echo $number >pong
    done
' &
machine=$!
# How often the threads that serve the stream have waited for the next request.
waited() {
    for task in /proc/$machine/task/*; do
        read name <"$task/comm"
        [ "$name" != folder ] || grep ^voluntary "$task/status"
    done | awk '{ sum += $2 } END { print sum + 0 }'
}
wait_until() {
    until "$@"; do
        kill -0 $machine
        sleep 0.05
    done
}
wait_until test -e up
before=$(waited)
echo 0 >ping
wait_until test -e made
after=$(waited)
for number in $(seq 1 200); do
    read found <tree/file-$number
    [ "$found" = "$number" ]
done
answered() {
    read found <pong && [ "$found" = "$1" ]
}
touch pong
for number in $(seq 1 10); do
    echo $number >ping
    wait_until answered $number
done
wait $machine
# Seventeen times a file, if no request is a call; a host that is busy leaves some to the stream.
echo "the stream's threads waited $((after - before)) times" >&2
[ $((after - before)) -lt 1000 ]
