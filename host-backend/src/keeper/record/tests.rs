//! What is replayed after what was said.

use super::*;

/// A request whose payload is these numbers of 32 bits.
fn request(request: u32, words: &[u32]) -> Rc<Message> {
    let payload = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Rc::new(Message::new(request, payload))
}

fn region(kind: u32, at: u32) -> Rc<Message> {
    // Padding, where in the guest, how long, where in QEMU, where in the file.
    request(kind, &[0, 0, at, 0, 4096, 0, at, 7, 0, 0])
}

fn record(messages: &[Rc<Message>]) -> Record {
    let mut record = Record::default();
    for message in messages {
        record.note(message.clone()).unwrap();
    }
    record
}

/// Requests and their first words.
fn replayed(record: &Record) -> Vec<(u32, u32)> {
    let (messages, answers) = record.replay();
    assert_eq!(answers, 2);
    let hello = (GET_FEATURES, 0);
    let all: Vec<_> = messages.iter().map(|m| (m.request, m.u32(0))).collect();
    assert_eq!((all.first(), all.last()), (Some(&hello), Some(&hello)));
    all[1..all.len() - 1].to_vec()
}

fn started() -> Vec<Rc<Message>> {
    vec![
        request(SET_OWNER, &[]),
        request(SET_PROTOCOL_FEATURES, &[1 << 3, 0]),
        request(SET_VRING_CALL, &[0, 0]),
        request(SET_FEATURES, &[5, 0]),
        request(SET_MEM_TABLE, &[1, 0]),
        request(SET_VRING_ENABLE, &[0, 1]),
        request(SET_VRING_ENABLE, &[1, 1]),
        request(SET_VRING_NUM, &[0, 256]),
        request(SET_VRING_BASE, &[0, 9]),
        request(SET_VRING_ADDR, &[0, 0]),
        request(SET_VRING_KICK, &[0, 0]),
    ]
}

#[test]
fn a_ring_that_runs_is_replayed_without_a_position_and_enabled_last() {
    assert_eq!(
        replayed(&record(&started())),
        [
            (SET_PROTOCOL_FEATURES, 8),
            (SET_OWNER, 0),
            (SET_FEATURES, 5),
            (SET_MEM_TABLE, 1),
            (SET_VRING_NUM, 0),
            (SET_VRING_ADDR, 0),
            (SET_VRING_CALL, 0),
            (SET_VRING_KICK, 0),
            (SET_VRING_ENABLE, 0),
            (SET_VRING_ENABLE, 1),
        ]
    );
}

#[test]
fn a_ring_that_was_stopped_is_where_the_answer_said() {
    let mut record = record(&started());
    let stop = request(GET_VRING_BASE, &[0, 0]);
    assert!(record.awaits_answer(&stop));
    let before = replayed(&record);
    record
        .answered(stop, &request(GET_VRING_BASE, &[0, 77]))
        .unwrap();
    let after = replayed(&record);
    let gone = [SET_VRING_ADDR, SET_VRING_CALL, SET_VRING_KICK];
    assert!(before.iter().any(|said| gone.contains(&said.0)));
    assert!(!after.iter().any(|said| gone.contains(&said.0)));
    let (messages, _) = record.replay();
    let base = messages
        .iter()
        .find(|m| m.request == SET_VRING_BASE)
        .unwrap();
    assert_eq!((base.u32(0), base.u32(4)), (0, 77));
}

#[test]
fn regions_of_memory_come_and_go() {
    let mut record = record(&[
        region(ADD_MEM_REG, 1),
        region(ADD_MEM_REG, 2),
        region(REM_MEM_REG, 1),
        region(ADD_MEM_REG, 3),
    ]);
    assert_eq!(replayed(&record), [(ADD_MEM_REG, 0), (ADD_MEM_REG, 0)]);
    record.note(request(SET_MEM_TABLE, &[1, 0])).unwrap();
    record.note(region(REM_MEM_REG, 9)).unwrap();
    let history = [(SET_MEM_TABLE, 1), (REM_MEM_REG, 0)];
    assert_eq!(
        replayed(&record),
        history,
        "a part of the table may be gone"
    );
    let endless = (0..u32::MAX).find(|at| record.note(region(REM_MEM_REG, *at)).is_err());
    assert!(
        endless.is_some_and(|at| at < 2000),
        "and no more than so many"
    );
}

#[test]
fn a_request_counts_when_it_is_answered_well() {
    let mut record = record(&started());
    let asking = |index| {
        let mut message = Message::new(SET_VRING_NUM, [3u32, index].map(u32::to_ne_bytes).concat());
        message.flags |= 1 << 3;
        Rc::new(message)
    };
    assert!(record.awaits_answer(&asking(1)));
    let sizes = |record: &Record| {
        let (messages, _) = record.replay();
        let sizes = messages
            .iter()
            .filter(|m| m.request == SET_VRING_NUM && m.u32(0) == 3);
        sizes.map(|m| m.u32(4)).collect::<Vec<_>>()
    };
    record
        .answered(asking(1), &request(SET_VRING_NUM, &[1, 0]))
        .unwrap();
    assert!(sizes(&record).is_empty(), "it was refused");
    record
        .answered(asking(2), &request(SET_VRING_NUM, &[0, 0]))
        .unwrap();
    assert_eq!(sizes(&record), [2]);
    let before = Record::default();
    assert!(
        !before.awaits_answer(&asking(1)),
        "nobody has said that there are answers"
    );
}

#[test]
fn what_no_device_has_is_left_to_the_device() {
    let mut record = record(&started());
    let before = replayed(&record);
    for kind in [
        SET_VRING_NUM,
        SET_VRING_ADDR,
        SET_VRING_BASE,
        SET_VRING_ENABLE,
    ] {
        record.note(request(kind, &[u32::MAX, 1])).unwrap();
        record.note(request(kind, &[64, 1])).unwrap();
    }
    for kind in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        record.note(request(kind, &[0xff, 0])).unwrap();
    }
    record.note(request(12345, &[])).unwrap();
    assert_eq!(replayed(&record), before);
    record.note(request(RESET_OWNER, &[])).unwrap();
    assert_eq!(replayed(&record), [(SET_MEM_TABLE, 1)]);
}
