"""`python -m agent.capturer`: the capturer's first process."""

from agent.capturer.supervisor import main

main()
