use super::*;
use std::io::Write;
use std::sync::mpsc::{Receiver, sync_channel};

fn watch(folder: &Path, since_ms: Option<u64>) -> (Receiver<String>, Arc<AtomicBool>) {
    let (sender, receiver) = sync_channel(64);
    let stop = Arc::new(AtomicBool::new(false));
    let (watcher, stopping) = (Watcher::new(folder.into(), since_ms), Arc::clone(&stop));
    std::thread::spawn(move || {
        watcher.run(&stopping, |notice| {
            let text = match notice {
                Notice::Found(found) => {
                    found.path.file_name().unwrap().to_str().unwrap().to_owned()
                }
                Notice::FolderLost(_) => "lost".into(),
                Notice::FolderBack => "back".into(),
                Notice::Ignored(count) => format!("ignored {count}"),
                Notice::Full => "full".into(),
            };
            sender.send(text).is_ok()
        });
    });
    (receiver, stop)
}

const WAIT: Duration = Duration::from_secs(10);

#[test]
fn files_come_once_each_and_in_order_of_names() {
    let dir = tempfile::tempdir().unwrap();
    let (found, stop) = watch(dir.path(), None);
    std::thread::sleep(Duration::from_millis(200));
    for name in ["b.dcm", "a.dcm", ".hidden", "c.dcm.part"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    fs::create_dir(dir.path().join("series")).unwrap();
    fs::write(dir.path().join("series/d.dcm"), "d").unwrap();
    let mut names: Vec<String> = (0..3).map(|_| found.recv_timeout(WAIT).unwrap()).collect();
    names.sort();
    assert_eq!(names, ["a.dcm", "b.dcm", "d.dcm"]);
    assert!(found.recv_timeout(Duration::from_millis(1500)).is_err());
    // A file that is written again is another file.
    fs::write(dir.path().join("a.dcm"), "longer than before").unwrap();
    assert_eq!(found.recv_timeout(WAIT).unwrap(), "a.dcm");
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn files_from_before_the_session_are_ignored_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("old.dcm"), "old").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let (found, stop) = watch(dir.path(), Some(crate::record::now_ms()));
    assert_eq!(found.recv_timeout(WAIT).unwrap(), "ignored 1");
    fs::write(dir.path().join("new.dcm"), "new").unwrap();
    assert_eq!(found.recv_timeout(WAIT).unwrap(), "new.dcm");
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_new_file_does_not_overtake_what_lay_there() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["1.dcm", "2.dcm"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let (found, stop) = watch(dir.path(), None);
    std::thread::sleep(Duration::from_millis(100));
    fs::write(dir.path().join("3.dcm"), "3").unwrap();
    let names: Vec<String> = (0..3).map(|_| found.recv_timeout(WAIT).unwrap()).collect();
    assert_eq!(names, ["1.dcm", "2.dcm", "3.dcm"]);
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_folder_that_goes_and_comes_back_is_said_once_each() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("in");
    fs::create_dir(&folder).unwrap();
    let (found, stop) = watch(&folder, None);
    std::thread::sleep(Duration::from_millis(700));
    fs::remove_dir(&folder).unwrap();
    assert_eq!(found.recv_timeout(WAIT).unwrap(), "lost");
    fs::create_dir(&folder).unwrap();
    assert_eq!(found.recv_timeout(WAIT).unwrap(), "back");
    fs::write(folder.join("x.dcm"), "x").unwrap();
    assert_eq!(found.recv_timeout(WAIT).unwrap(), "x.dcm");
    stop.store(true, Ordering::Relaxed);
}

/// A watcher that knows its folder, with whatever was there handed on.
fn at(folder: &Path, mount: Mount) -> (Watcher, Vec<Found>) {
    let mut watcher = Watcher::new(folder.into(), None);
    watcher.pace = Pace::new(mount);
    let mut found = Vec::new();
    watcher.scan(&mut found).unwrap();
    (watcher, found)
}

/// One that events tell of its folder.
fn told(folder: &Path) -> (Watcher, Vec<Found>) {
    let (mut watcher, found) = at(folder, Mount::Local);
    watcher.events = Events::new(folder);
    assert!(watcher.events.is_some());
    (watcher, found)
}

fn wait(duration: Duration) {
    std::thread::sleep(duration + Duration::from_millis(10));
}

const AT_ONCE: Duration = Duration::ZERO;

#[test]
fn folders_that_appear_later_are_told_of_at_any_depth() {
    let dir = tempfile::tempdir().unwrap();
    let (mut watcher, mut found) = told(dir.path());
    let deep = dir.path().join("patient/study/series");
    fs::create_dir_all(&deep).unwrap();
    // One level is told at a time; no scan helps.
    for _ in 0..3 {
        watcher.wait_for_events(AT_ONCE, &mut found);
    }
    fs::write(deep.join("a.dcm"), "a").unwrap();
    watcher.wait_for_events(AT_ONCE, &mut found);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].path, deep.join("a.dcm"));
    // Files that a folder brings with it are seen as well.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("b.dcm"), "b").unwrap();
    fs::rename(outside.path(), dir.path().join("moved")).unwrap();
    watcher.wait_for_events(AT_ONCE, &mut found);
    wait(STILL);
    watcher.look_at_pending(&mut found);
    assert_eq!(found[1].path, dir.path().join("moved/b.dcm"));
    assert_eq!(found.len(), 2);
}

#[test]
fn folders_too_deep_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut watcher, mut found) = told(dir.path());
    let deep = dir.path().join("1/2/3/4/5");
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("a.dcm"), "a").unwrap();
    for _ in 0..6 {
        watcher.wait_for_events(AT_ONCE, &mut found);
        watcher.scan(&mut found).unwrap();
    }
    wait(STILL);
    watcher.scan(&mut found).unwrap();
    assert!(found.is_empty());
}

#[test]
fn a_writer_that_pauses_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (mut watcher, mut found) = told(dir.path());
    let mut file = File::create(dir.path().join("slow.dcm")).unwrap();
    for _ in 0..3 {
        file.write_all(b"piece").unwrap();
        // Longer than an abandoned file would have to be still.
        wait(STILL + LOOK_EVERY);
        watcher.wait_for_events(AT_ONCE, &mut found);
        watcher.scan(&mut found).unwrap();
        watcher.look_at_pending(&mut found);
        assert!(found.is_empty(), "{found:?}");
    }
    drop(file);
    watcher.wait_for_events(AT_ONCE, &mut found);
    watcher.scan(&mut found).unwrap();
    let lengths: Vec<u64> = found.iter().map(|found| found.len_bytes).collect();
    assert_eq!(lengths, [15]);
}

#[test]
fn a_file_that_its_writer_never_closes_is_handed_on_when_it_is_still() {
    let dir = tempfile::tempdir().unwrap();
    let (mut watcher, mut found) = told(dir.path());
    let mut file = File::create(dir.path().join("held.dcm")).unwrap();
    file.write_all(b"whole").unwrap();
    watcher.wait_for_events(AT_ONCE, &mut found);
    wait(STILL_OPEN);
    watcher.look_at_pending(&mut found);
    assert_eq!(found.len(), 1);
    // The next one of that length is known to be whole much sooner.
    let mut next = File::create(dir.path().join("next.dcm")).unwrap();
    next.write_all(b"whole").unwrap();
    watcher.wait_for_events(AT_ONCE, &mut found);
    wait(STILL_OPEN_ALIKE);
    watcher.look_at_pending(&mut found);
    assert_eq!(found.len(), 2);
    drop((file, next));
}

#[test]
fn a_growing_nii_is_handed_on_after_every_piece() {
    let dir = tempfile::tempdir().unwrap();
    let (mut watcher, mut found) = told(dir.path());
    let path = dir.path().join("bold.nii");
    let mut file = File::create(&path).unwrap();
    for piece in 1..=3 {
        file.write_all(&[1; 1000]).unwrap();
        watcher.wait_for_events(AT_ONCE, &mut found);
        wait(STILL_GROWING);
        watcher.look_at_pending(&mut found);
        assert_eq!(found.len(), piece);
    }
    let lengths: Vec<u64> = found.iter().map(|found| found.len_bytes).collect();
    assert_eq!(lengths, [1000, 2000, 3000]);
    assert!(found.iter().all(|found| found.path == path));
    assert_ne!(found[0].id, found[1].id);
    // Closing it adds nothing.
    drop(file);
    watcher.wait_for_events(AT_ONCE, &mut found);
    watcher.scan(&mut found).unwrap();
    assert_eq!(found.len(), 3);
}

#[test]
fn a_share_is_polled_and_a_file_like_the_last_one_needs_two_looks() {
    let dir = tempfile::tempdir().unwrap();
    let (mut watcher, mut found) = at(dir.path(), Mount::Remote);
    let series = dir.path().join("series");
    fs::create_dir(&series).unwrap();
    fs::write(series.join("1.dcm"), [7; 2000]).unwrap();
    watcher.scan(&mut found).unwrap();
    assert!(found.is_empty(), "one look does not tell that it is whole");
    wait(STILL_ALIKE);
    watcher.look_at_pending(&mut found);
    assert!(
        found.is_empty(),
        "nothing is known of the length of such files"
    );
    wait(STILL);
    watcher.look_at_pending(&mut found);
    assert_eq!(found.len(), 1);

    fs::write(series.join("2.dcm"), [8; 2000]).unwrap();
    watcher.poll(&mut found);
    wait(STILL_ALIKE);
    watcher.look_at_pending(&mut found);
    assert_eq!(found.len(), 2);
}

#[test]
fn a_file_whose_room_was_made_first_is_not_taken_for_whole() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("1.dcm"), [7; 2000]).unwrap();
    let (mut watcher, mut found) = at(dir.path(), Mount::Remote);
    wait(STILL);
    watcher.scan(&mut found).unwrap();
    assert_eq!(found.len(), 1);

    let mut file = File::create(dir.path().join("2.dcm")).unwrap();
    file.set_len(2000).unwrap();
    watcher.poll(&mut found);
    wait(STILL_ALIKE);
    watcher.look_at_pending(&mut found);
    assert_eq!(found.len(), 1, "its end is not written");
    file.write_all(&[8; 2000]).unwrap();
    watcher.look_at_pending(&mut found);
    wait(STILL_ALIKE);
    watcher.look_at_pending(&mut found);
    assert_eq!(found.len(), 2);
}

#[test]
fn old_files_of_a_share_that_comes_back_are_not_new() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, away) = (dir.path().join("in"), dir.path().join("away"));
    fs::create_dir(&folder).unwrap();
    fs::create_dir(&away).unwrap();
    fs::write(folder.join("old.dcm"), "old").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let mut watcher = Watcher::new(folder.clone(), Some(crate::record::now_ms()));
    let mut found = Vec::new();
    // The empty mount point of a share that is away can be read.
    watcher.scan(&mut found).unwrap();
    fs::rename(folder.join("old.dcm"), away.join("old.dcm")).unwrap();
    watcher.scan(&mut found).unwrap();
    fs::rename(away.join("old.dcm"), folder.join("old.dcm")).unwrap();
    for _ in 0..4 {
        watcher.scan(&mut found).unwrap();
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(found.is_empty(), "{found:?}");
    fs::write(folder.join("new.dcm"), "new").unwrap();
    for _ in 0..4 {
        watcher.scan(&mut found).unwrap();
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(found.len(), 1, "{found:?}");
}
