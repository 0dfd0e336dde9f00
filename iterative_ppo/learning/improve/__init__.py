"""SingleTurnOpt(Q): from a policy, prompts and a frozen Q to a policy that Q likes better, near the old one."""
