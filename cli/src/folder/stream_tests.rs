//! Messages that come in pieces, several at once, or not at all.

use std::thread;

use super::*;

/// A request of `length` bytes, filled with its number.
fn request(number: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![number; length];
    bytes[..4].copy_from_slice(&u32::try_from(length).unwrap().to_ne_bytes());
    bytes
}

fn pair() -> (Queue, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (Queue::new(near, None, None), far)
}

fn received(queue: &Queue) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1 << 20];
    let length = queue.receive(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

#[test]
fn requests_come_whole_however_they_are_cut() {
    let (queue, mut far) = pair();
    let sent: Vec<_> = [40, 41, 4096, 65536, 70_000, 40, 1 << 20, 56]
        .into_iter()
        .zip(1..)
        .map(|(length, number)| request(number, length))
        .collect();
    let stream = sent.concat();
    let sender = thread::spawn(move || {
        for piece in stream.chunks(5003) {
            far.write_all(piece).unwrap();
        }
    });
    for expected in sent {
        assert!(received(&queue).unwrap() == expected);
    }
    sender.join().unwrap();
    assert_eq!(received(&queue).unwrap(), b"");
}

#[test]
fn one_byte_at_a_time_is_a_message_too() {
    let (queue, mut far) = pair();
    let sent = request(7, 100);
    let bytes = sent.clone();
    let sender = thread::spawn(move || {
        for byte in bytes {
            far.write_all(&[byte]).unwrap();
        }
    });
    assert_eq!(received(&queue).unwrap(), sent);
    sender.join().unwrap();
}

#[test]
fn lengths_that_cannot_be_end_the_connection() {
    for length in [0_u32, 1, 39, (1 << 20) + 1, u32::MAX] {
        let (queue, mut far) = pair();
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        far.write_all(&bytes).unwrap();
        let error = received(&queue).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{length}");
    }
}

#[test]
fn half_a_request_is_an_error_and_none_is_the_end() {
    for cut in [1, 3, 4, 39, 99] {
        let (queue, mut far) = pair();
        far.write_all(&request(1, 100)[..cut]).unwrap();
        drop(far);
        let error = received(&queue).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{cut}");
    }
    let (queue, far) = pair();
    drop(far);
    assert_eq!(received(&queue).unwrap(), b"");
}

#[test]
fn whoever_waits_is_let_go_when_it_ends() {
    let (queue, _far) = pair();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| received(&queue).unwrap());
        queue.end();
        assert_eq!(waiting.join().unwrap(), b"");
    });
}

/// Takes requests on `threads` threads until the end, as long as `busy` each, and returns how many each took.
fn taken_by(queue: &Queue, threads: usize, busy: impl Fn(&[u8]) + Sync) -> Vec<usize> {
    thread::scope(|scope| {
        let take = || {
            let mut count = 0;
            loop {
                let request = received(queue).unwrap();
                if request.is_empty() {
                    return count;
                }
                busy(&request);
                count += 1;
            }
        };
        let taking: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        taking
            .into_iter()
            .map(|taken| taken.join().unwrap())
            .collect()
    })
}

/// A request for `opcode`.
fn operation(opcode: Opcode) -> Vec<u8> {
    let mut bytes = request(0, 80);
    bytes[4..8].copy_from_slice(&(opcode as u32).to_ne_bytes());
    bytes
}

#[test]
fn one_request_after_the_other_stays_on_one_thread() {
    let (queue, mut far) = pair();
    let sender = thread::spawn(move || {
        let mut answer = [0; 5];
        for _ in 0..100 {
            far.write_all(&operation(Opcode::Lookup)).unwrap();
            far.read_exact(&mut answer).unwrap();
        }
    });
    let reply = |_: &[u8]| queue.send(&[IoSlice::new(b"reply")]).unwrap();
    let mut counts = taken_by(&queue, 3, reply);
    sender.join().unwrap();
    counts.sort_unstable();
    assert_eq!(counts, [0, 0, 100]);
}

#[test]
fn what_takes_long_keeps_no_other_request_waiting() {
    let (queue, mut far) = pair();
    far.write_all(&operation(Opcode::Fsync)).unwrap();
    let (go, wait) = std::sync::mpsc::channel();
    let wait = Mutex::new(wait);
    let busy = |message: &[u8]| match message == operation(Opcode::Fsync) {
        true => wait.lock().unwrap().recv().unwrap(),
        false => go.send(()).unwrap(),
    };
    let sender = thread::spawn(move || {
        far.write_all(&operation(Opcode::Getattr)).unwrap();
    });
    assert_eq!(taken_by(&queue, 2, busy).iter().sum::<usize>(), 2);
    sender.join().unwrap();
}

#[test]
fn requests_that_wait_together_are_taken_by_several_threads() {
    let (queue, mut far) = pair();
    far.write_all(&operation(Opcode::Getattr).repeat(2))
        .unwrap();
    drop(far);
    // Neither goes on before the other one has been taken.
    let both = std::sync::Barrier::new(2);
    let counts = taken_by(&queue, 2, |_| {
        both.wait();
    });
    assert_eq!(counts, [1, 1]);
}

#[test]
fn replies_of_several_threads_do_not_mix() {
    let (queue, mut far) = pair();
    const EACH: usize = 50;
    thread::scope(|scope| {
        for number in 1..=4_u8 {
            let queue = &queue;
            scope.spawn(move || {
                for _ in 0..EACH {
                    let message = request(number, 9000);
                    let (head, body) = message.split_at(16);
                    queue
                        .send(&[IoSlice::new(head), IoSlice::new(body)])
                        .unwrap();
                }
            });
        }
        let mut counts = [0; 5];
        let mut message = vec![0; 9000];
        for _ in 0..4 * EACH {
            far.read_exact(&mut message).unwrap();
            assert_eq!(message, request(message[4], 9000));
            counts[usize::from(message[4])] += 1;
        }
        assert_eq!(counts, [0, EACH, EACH, EACH, EACH]);
    });
    assert_eq!(queue.replies.load(Ordering::Acquire), 4 * EACH as u64);
}

#[test]
fn notices_say_which_replies_they_come_after() {
    let (first, _first) = pair();
    let (second, _second) = pair();
    let queues: Arc<[Queue]> = Arc::new([first, second]);
    let (near, mut far) = UnixStream::pair().unwrap();
    let notices = Notices::new(near, queues.clone());
    let notice = request(9, 20);
    let mut told = |queues: &[u64]| {
        notices.send(&[IoSlice::new(&notice)]).unwrap();
        let expected = match queues {
            [] => notice.clone(),
            counts => [for_agent(AFTER_REPLIES, counts, &[]), notice.clone()].concat(),
        };
        let mut bytes = vec![0; expected.len()];
        far.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, expected);
    };
    told(&[]);
    queues[1].send(&[IoSlice::new(b"reply")]).unwrap();
    told(&[0, 1, 0, 0]);
    told(&[]);
    queues[0].send(&[IoSlice::new(b"reply")]).unwrap();
    queues[0].send(&[IoSlice::new(b"reply")]).unwrap();
    told(&[2, 1, 0, 0]);
    let message = for_agent(AFTER_REPLIES, &[2, 1], &[]);
    assert_eq!(message.len(), 32);
    assert_eq!(message[..4], 32_u32.to_ne_bytes());
    assert_eq!(message[4..8], i32::MAX.to_ne_bytes());
}
