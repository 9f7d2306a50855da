"""`python -m graft_worker`: one worker for one device."""

from graft_worker.celery_app import main

if __name__ == "__main__":
    main()
